"""Selection of elements: by a threshold, the k largest, at random."""
