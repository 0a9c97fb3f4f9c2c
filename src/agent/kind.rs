//! Which agent a guest has.

use std::error;
use std::fmt;
use std::str::FromStr;

use serde_derive::{Deserialize, Serialize};

/// Which agent a guest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// None.
    Noop,
    /// Kata's of 2.x and later, or ours.
    #[default]
    Kata,
    /// Kata's of 1.x: the same type, but gRPC.
    Kata1,
    /// hyperstart.
    Hyperstart,
}

impl Kind {
    /// All there are.
    pub const ALL: [Kind; 4] = [Kind::Noop, Kind::Kata, Kind::Kata1, Kind::Hyperstart];

    /// The types by which configurations name them.
    const TYPES: [&'static str; 3] = ["noop", "kata", "hyperstart"];

    /// Kata's name for its type.
    pub fn type_name(self) -> &'static str {
        match self {
            Kind::Noop => "noop",
            Kind::Kata | Kind::Kata1 => "kata",
            Kind::Hyperstart => "hyperstart",
        }
    }

    /// What people call it.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Noop => "noop",
            Kind::Kata => "kata (ttrpc)",
            Kind::Kata1 => "kata 1.x (gRPC)",
            Kind::Hyperstart => "hyperstart",
        }
    }
}

/// A type of agent that nobody knows.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownKind(String);

impl fmt::Display for UnknownKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unknown agent type {}; there are {}", self.0, Kind::TYPES.join(", "))
    }
}

impl error::Error for UnknownKind {}

impl FromStr for Kind {
    type Err = UnknownKind;

    /// By the name of its type; `kata` is the one of 2.x and later.
    fn from_str(text: &str) -> Result<Kind, UnknownKind> {
        match text {
            "noop" => Ok(Kind::Noop),
            "kata" => Ok(Kind::Kata),
            "hyperstart" => Ok(Kind::Hyperstart),
            other => Err(UnknownKind(other.chars().take(64).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_are_named_as_kata_names_them() {
        for name in Kind::TYPES {
            assert_eq!(name.parse::<Kind>().unwrap().type_name(), name);
        }
        let e = "pigeon".parse::<Kind>().unwrap_err().to_string();
        assert_eq!(e, "Unknown agent type pigeon; there are noop, kata, hyperstart");
    }
}
