"""Around a training: the processes of a job, exit statuses, locks, the heartbeat, files, output, progress."""
