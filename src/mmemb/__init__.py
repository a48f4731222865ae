"""mmemb: multimodal embedding models that think when it pays. Importing this is light; torch loads with the parts that need it."""

__version__ = "0.1.0"
