"""One file per published contract."""
