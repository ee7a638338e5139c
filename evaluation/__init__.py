"""What a run is once it is trained: held-out errors, figures, heads that read its features, search
for actions in it."""
