"""What a checkpoint answers and where it looks: greedy accuracy, shuffled control, VAS and masses, heat maps."""
