"""What a person looks at: `lrai bench`."""
