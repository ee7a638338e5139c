"""Files: how recordings, episodes, latents and shards lie on disks, at URLs and in buckets."""
