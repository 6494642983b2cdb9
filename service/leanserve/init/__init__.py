"""`leanserve init`: a first config for somebody's model, written after looking at it."""
