"""What people's adapters look like: folders of PEFT and MLX, read without torch."""
