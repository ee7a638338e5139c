"""How recordings, episodes, latents and shards lie in files, at URLs and in buckets."""
