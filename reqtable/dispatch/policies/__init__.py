"""The six dispatch policies, one file each."""
