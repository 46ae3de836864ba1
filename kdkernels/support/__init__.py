"""What every folder stands on: errors, files, the terminal, the memory of devices."""
