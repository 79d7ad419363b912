"""What koff is measured against, each written as well as its libraries allow."""
