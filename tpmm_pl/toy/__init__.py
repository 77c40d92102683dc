"""The embedded task "letters": generated problems, a gold rule and a biased annotator."""
