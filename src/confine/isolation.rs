//! How far VMs are isolated, in one word, and why: for status, metrics and doctor.
//!
//! The word is of what stands between a guest and its QEMU, by QEMU's own policy, and of what
//! stands between its QEMU and the rest. It promises no more than is known: flaws that nobody
//! has found are not in it.
//!
//! Source: QEMU's docs/system/security.rst: "Bugs affecting the non-virtualization use case are
//! not considered security bugs at this time"; TCG is that use case.

use serde_derive::Serialize;

use super::files;
use super::user::Whose;
use crate::config::options::OURS;
use crate::config::{Accel, Config};

/// How VMs are isolated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Isolation {
    /// `kvm` or `tcg`.
    pub accel: &'static str,
    /// `vm`, `weak` or `none`.
    pub isolation: &'static str,
    /// Why it is no more; empty for `vm`.
    pub why: String,
}

/// How a configuration's VMs are, on this host.
pub fn isolation(config: &Config) -> Isolation {
    let accel = match config.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    };
    if config.accel == Accel::Tcg {
        let why = "guests are translated (accel is \"tcg\"), and QEMU promises no isolation then";
        return Isolation { accel, isolation: "none", why: why.into() };
    }
    let weak: Vec<&str> = weaknesses(config).into_iter().flatten().collect();
    let isolation = if weak.is_empty() { "vm" } else { "weak" };
    Isolation { accel, isolation, why: weak.join("; ") }
}

fn weaknesses(config: &Config) -> [Option<&'static str>; 7] {
    let whose = Whose::of(config).ok();
    let off = |key: &str| !config.flag(OURS, key);
    [
        off("confine").then_some("confine is false"),
        off("sandbox").then_some("sandbox is false"),
        (!files::possible()).then_some("this kernel has no Landlock"),
        matches!(whose, Some(Whose::Server)).then_some("all QEMUs are the server's user"),
        matches!(whose, Some(Whose::Root)).then_some("QEMU is root"),
        config.shares_9p().then_some("9p is for guests that are trusted"),
        config.flag(OURS, "nested").then_some("guests may run VMs of their own"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_no_more_than_it_is() {
        let of = |text: &str| {
            let text = format!("[vmcache]\nuser = \"1900000000-1900000009\"\n{text}");
            isolation(&Config::parse("c".as_ref(), &text).unwrap())
        };
        assert_eq!(of("accel = \"tcg\"").isolation, "none");
        if files::possible() {
            assert_eq!(of("").isolation, "vm");
        }
        let weak = of("confine = false\nnested = true");
        assert_eq!((weak.accel, weak.isolation), ("kvm", "weak"));
        assert!(weak.why.starts_with("confine is false; "), "{}", weak.why);
    }
}
