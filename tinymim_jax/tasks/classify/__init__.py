"""Fine-tuning with labels."""
