//! The guest's own name, as what looks hosts up in files finds it: /etc/hosts.
//!
//! Invariant: a name that is there already stays as it is.

use std::fs;
use std::path::Path;

use super::failure::{Attempt, Failure, Outcome};

/// Where it is told, here and in containers.
pub const HOSTS: &str = "/etc/hosts";
/// Host names have at most so many bytes (hostname(7)).
const MAX_NAME: usize = 64;
const LOCALHOST: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Lets `name` resolve to this guest, as Debian does it without a network.
pub fn know(name: &str) -> Outcome<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.len() > MAX_NAME || !name.chars().all(good) {
        return Err(Failure::invalid(format!("{name:?} is no name of a host")));
    }
    let old = fs::read(HOSTS).unwrap_or_default();
    let Some(new) = with(&String::from_utf8_lossy(&old), name) else { return Ok(()) };
    if let Some(dir) = Path::new(HOSTS).parent() {
        fs::create_dir_all(dir).during(|| format!("create {}", dir.display()))?;
    }
    // Whole, or as it was.
    let part = format!("{HOSTS}.part");
    fs::write(&part, new).during(|| format!("write {part}"))?;
    fs::rename(&part, HOSTS).during(|| format!("write {HOSTS}"))
}

/// The lines with one for `name`; `None` when they have it.
fn with(old: &str, name: &str) -> Option<String> {
    let words = |line: &str| {
        let line = line.split('#').next().unwrap_or_default().to_string();
        line.split_whitespace().skip(1).map(str::to_string).collect::<Vec<_>>()
    };
    if old.lines().any(|l| words(l).iter().any(|w| w == name)) {
        return None;
    }
    let mut new = match old.trim() {
        "" => LOCALHOST.to_string(),
        _ => old.to_string(),
    };
    if !new.ends_with('\n') {
        new.push('\n');
    }
    new.push_str(&format!("127.0.1.1\t{name}\n"));
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_added_once() {
        let first = with("", "vm-1").unwrap();
        assert!(first.starts_with("127.0.0.1\tlocalhost\n") && first.ends_with("\tvm-1\n"));
        assert_eq!(with(&first, "vm-1"), None);
        assert_eq!(
            with("1.2.3.4 a # vm-1", "vm-1").unwrap(),
            "1.2.3.4 a # vm-1\n127.0.1.1\tvm-1\n"
        );
        assert!(know("a b").is_err());
    }
}
