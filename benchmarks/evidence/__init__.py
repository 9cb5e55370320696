"""Does each method help? Comparisons, their stored cells, and the page that shows them."""
