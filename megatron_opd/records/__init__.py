"""What a run leaves in its folder for people to look at, written and read: step lines, responses, drift by position."""
