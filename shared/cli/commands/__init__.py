"""The commands of `shopkeeper`, by what they are about; `shared.cli.app` names them."""
