"""Bytes from the SSD to memory: readers, the bank of expert slots, and which slot to give up."""
