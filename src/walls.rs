//! The walls between guests, claimers, strangers and the host, by name, so that a test can
//! take one down and show that what it tries would succeed without it.
//!
//! Invariant: a program without the feature `faults` has no way to take one down; no package
//! has that feature.

/// A wall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wall {
    /// Each VM's QEMU has a user of its own.
    Users,
    /// The filter of system calls that QEMU starts with.
    Seccomp,
    /// QEMU's empty network namespace.
    Network,
    /// The mount namespace of a QEMU that is root.
    Mounts,
    /// Landlock's rules.
    Landlock,
    /// Seals on what QEMUs share in memory.
    Seals,
    /// A keyring of QEMU's own.
    Keyring,
    /// The relay in front of gRPC, with its limits.
    Relay,
    /// No files can be passed to the server's socket.
    Rights,
    /// Files that are passed all the same hold up no thread of the relay's.
    Files,
    /// Limits of what one user may have.
    Quotas,
    /// What is copied out of a guest is made harmless.
    Copies,
    /// What is printed or logged is made harmless.
    Texts,
    /// Configured paths must be root's or this user's.
    Paths,
}

impl Wall {
    /// Its name in [`VARIABLE`].
    pub const fn name(self) -> &'static str {
        match self {
            Wall::Users => "users",
            Wall::Seccomp => "seccomp",
            Wall::Network => "network",
            Wall::Mounts => "mounts",
            Wall::Landlock => "landlock",
            Wall::Seals => "seals",
            Wall::Keyring => "keyring",
            Wall::Relay => "relay",
            Wall::Rights => "rights",
            Wall::Files => "files",
            Wall::Quotas => "quotas",
            Wall::Copies => "copies",
            Wall::Texts => "texts",
            Wall::Paths => "paths",
        }
    }

    /// Whether it stands: always, but in a test that has taken it down.
    pub fn stands(self) -> bool {
        !down(self.name())
    }
}

/// Environment variable of tests: the walls that are down, with commas between; `all` for all.
#[cfg(feature = "faults")]
pub const VARIABLE: &str = "VMCACHE_WALLS_DOWN";
/// Environment variable of tests: the newest version of Landlock that is used.
#[cfg(feature = "faults")]
pub const LANDLOCK_ABI: &str = "VMCACHE_LANDLOCK_ABI";

#[cfg(feature = "faults")]
fn down(name: &str) -> bool {
    std::env::var(VARIABLE).is_ok_and(|t| t.split(',').any(|w| w == name || w == "all"))
}

#[cfg(not(feature = "faults"))]
fn down(_name: &str) -> bool {
    false
}

/// The newest version of Landlock that a test allows; `None`: any.
pub fn landlock_abi() -> Option<u32> {
    #[cfg(feature = "faults")]
    return std::env::var(LANDLOCK_ABI).ok()?.parse().ok();
    #[cfg(not(feature = "faults"))]
    None
}
