"""What happens to a gradient: local transforms, exchanges between ranks, and published methods composed of both."""
