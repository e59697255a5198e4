"""What happens to a gradient: local transforms, exchanges, and published methods as compositions."""
