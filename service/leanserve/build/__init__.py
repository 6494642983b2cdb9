"""From a plan of variants to artifacts."""
