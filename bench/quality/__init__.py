"""Does a memory win back what pruning loses: trainings over sparsities and seeds, one table."""
