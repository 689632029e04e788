"""`pdlm demo`: a page on which people mark regions of a picture and watch their captions emerge."""
