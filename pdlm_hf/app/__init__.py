"""What stays at home: regions, captioner, collator, drawing, command line."""
