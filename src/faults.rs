//! Faults that tests ask for, of kinds that the real thing can not be made to show.
//! In no package: the feature `faults` is the tests' own.

use std::fs;

/// Environment variable: the name of a point, a colon, and a file whose being there
/// asks for the fault, once.
pub const VARIABLE: &str = "VMCACHE_FAULT";

/// Panics here, when that is asked for; or, for `stuck-` and the name, stays as long as
/// the file is there.
///
/// # Panics
/// That is what it is for.
pub fn point(name: &str) {
    let Ok(text) = std::env::var(VARIABLE) else { return };
    let Some((wanted, file)) = text.split_once(':') else { return };
    if wanted.strip_prefix("stuck-") == Some(name) {
        // Longer than any limit, unless the file goes.
        while fs::exists(file).unwrap_or(false) {
            let _ = crossbeam_channel::after(std::time::Duration::from_millis(50)).recv();
        }
    }
    assert!(wanted != name || fs::remove_file(file).is_err(), "asked for by {VARIABLE}");
}

/// A number in a file, instead of one that the host has: `name` and the file are the
/// variable's. For tests whose machine others use as well.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(VARIABLE).ok()?;
    let (wanted, file) = text.split_once(':')?;
    (wanted == name).then(|| fs::read_to_string(file).ok()?.trim().parse().ok())?
}

/// Whether this is asked for, for good: no file is needed.
pub fn asked(name: &str) -> bool {
    std::env::var(VARIABLE).is_ok_and(|text| text == name)
}
