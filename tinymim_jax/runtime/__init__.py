"""What surrounds a training: processes of a job, exit status, locks, heartbeat, progress."""
