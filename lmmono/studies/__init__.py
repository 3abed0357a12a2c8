"""What is concluded from rows: paired differences, hypotheses, doses."""
