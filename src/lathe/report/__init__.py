"""Tables and plots as one HTML file that opens anywhere: styles and pictures are inside it."""
