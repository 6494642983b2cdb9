"""HTTP on one connection; knows no route."""
