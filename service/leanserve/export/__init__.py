"""`leanserve export`: a variant as files that run without leanserve."""
