"""What every format offers (a source and a sink), and what they share."""
