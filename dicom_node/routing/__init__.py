"""Rules and completion: pure, the clock is passed in."""
