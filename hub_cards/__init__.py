"""Model cards for the Hub, as templates in Markdown. Installed as `longlive_diffusers.hub_cards`."""
