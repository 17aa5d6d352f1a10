"""What no change may make worse, measured against another commit."""
