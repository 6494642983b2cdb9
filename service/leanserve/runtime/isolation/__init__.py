"""A backend in a process of its own: what crashes, hangs or is killed there takes that process along, and no other."""
