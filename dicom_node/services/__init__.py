"""What to answer: services that know no wire."""
