"""Codecs: one file per kind of body that clients send; each turns bytes into arrays and outputs into answers."""
