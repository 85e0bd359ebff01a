"""What this machine can do, measured beside the limits that it was measured against."""
