"""The one mover: state of one layout to another, through an operator."""
