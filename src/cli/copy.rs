//! `vmcache cp`.

use std::path::Path;

use super::args::{Common, Cp};
use super::claimed::with_guest;
use super::interrupt::Interrupt;
use super::output::{Failure, FAILED, USAGE};
use super::{print, Outcome};
use crate::workload::{copy_in, copy_out, CopyPolicy};

/// Splits `ID:PATH`; a path with a slash before the colon is local.
fn remote(text: &str) -> Option<(&str, &str)> {
    let (id, path) = text.split_once(':')?;
    (!id.is_empty() && !id.contains('/') && !id.starts_with('.')).then_some((id, path))
}

/// Copies in or out.
pub fn cp(common: &Common, c: &Cp) -> Outcome {
    let interrupt = Interrupt::take()?;
    let done = match (remote(&c.source), remote(&c.target)) {
        (None, Some((id, directory))) => copy_into(common, c, id, directory, &interrupt),
        (Some((id, path)), None) => copy_from(common, c, id, path, &interrupt),
        _ => Err(Failure::new(
            USAGE,
            "one of source and target must be in a VM, as ID:PATH, and the other on this host",
        )),
    };
    match interrupt.code() {
        Some(code) => Ok(code),
        None => done.map(|()| 0),
    }
}

fn copy_into(
    common: &Common,
    c: &Cp,
    id: &str,
    directory: &str,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let source = Path::new(&c.source);
    let failed = |why: String| Failure::new(FAILED, format!("copy {}: {why}", c.source));
    let full = source.canonicalize().map_err(|e| failed(e.to_string()))?;
    let name = full.file_name().ok_or_else(|| failed("it has no name".into()))?;
    let directory = if directory.is_empty() { "/" } else { directory };
    with_guest(common, id, |g| {
        let directory = in_root(&g.root(), directory)?;
        Ok(copy_in(g, &full, &directory, Path::new(name), &interrupt.stop)?)
    })
}

fn copy_from(
    common: &Common,
    c: &Cp,
    id: &str,
    path: &str,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    if c.archive && !nix::unistd::geteuid().is_root() {
        let text = "--archive: only root can give files other owners, and make devices";
        return Err(Failure::new(USAGE, text));
    }
    let policy =
        CopyPolicy { archive: c.archive, max_bytes: c.max_size, max_entries: c.max_entries };
    let copied = with_guest(common, id, |g| {
        let path = in_root(&g.root(), path)?;
        Ok(copy_out(g, &path, Path::new(&c.target), &policy, &interrupt.stop)?)
    })?;
    if let Some((file, name, n)) = copied.lost {
        let file = file.display();
        print::message(format!(
            "warning: {n} extended attributes are not kept by the target's file system, the first \
             {name} of {file}"
        ));
    }
    Ok(())
}

/// A path of the workload's root, as the guest's own root names it.
fn in_root(root: &str, path: &str) -> Result<String, Failure> {
    if !path.starts_with('/') || path.split('/').any(|p| p == "..") {
        let text = format!("path {path:?} in the VM: must be absolute, without \"..\"");
        return Err(Failure::new(USAGE, text));
    }
    Ok(format!("{}{path}", root.trim_end_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_remote_paths_are_told_apart() {
        assert_eq!(remote("ab12:/etc"), Some(("ab12", "/etc")));
        assert_eq!(remote("./a:b"), None);
        assert_eq!(remote("/a:b"), None);
        assert_eq!(remote("plain"), None);
        assert_eq!(in_root("/", "/etc").unwrap(), "/etc");
        assert_eq!(in_root("/run/r", "/etc").unwrap(), "/run/r/etc");
        assert!(in_root("/", "/../etc").is_err());
    }
}
