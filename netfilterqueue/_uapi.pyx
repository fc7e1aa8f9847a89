"""The numbers of the headers that modules in Python need."""
