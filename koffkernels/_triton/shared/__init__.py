"""What every kernel uses: launching, joining torch, sums."""
