"""What every stage stands on: draws, threads and device, files that survive a kill, progress."""
