"""How the pocket models were trained; nothing else imports this."""
