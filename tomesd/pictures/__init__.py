"""Making, comparing and drawing images: what the command and the playground share."""
