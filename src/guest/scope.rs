//! Where a path of the workload leads when its root is a directory of this guest: links are
//! followed as in that root, not as in this one.
//!
//! Invariant: what comes out is in the root. It is the guest's own to trust: somebody who
//! changes links meanwhile is in the same guest.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;

use super::failure::{Attempt, Outcome};

/// Most links on the way: Linux's own bound.
const MAX_LINKS: usize = 40;

/// Resolves a path of `root`, whose last part need not be there; a link there is followed
/// when `follow` says so.
pub fn resolve(root: &Path, path: &Path, follow: bool) -> Outcome<PathBuf> {
    let mut left: VecDeque<OsString> = parts(path);
    let mut here: Vec<OsString> = Vec::new();
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        if part == ".." {
            here.pop();
            continue;
        }
        here.push(part);
        if left.is_empty() && !follow {
            break;
        }
        let Ok(link) = std::fs::read_link(within(root, &here)) else { continue };
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::ELOOP).during(|| format!("resolve {}", path.display()));
        }
        here.pop();
        if link.is_absolute() {
            here.clear();
        }
        for part in parts(&link).into_iter().rev() {
            left.push_front(part);
        }
    }
    Ok(within(root, &here))
}

/// A path in `root` as the workload names it.
pub fn shown(root: &Path, path: &Path) -> PathBuf {
    Path::new("/").join(path.strip_prefix(root).unwrap_or(path))
}

fn within(root: &Path, parts: &[OsString]) -> PathBuf {
    let mut path = root.to_path_buf();
    path.extend(parts);
    path
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(part) => Some(part.to_os_string()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_nowhere_but_into_the_root() {
        let dir = std::env::temp_dir().join(format!("vmcache-scope-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("etc")).unwrap();
        symlink("/etc", dir.join("absolute")).unwrap();
        symlink("../../../etc", dir.join("up")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        symlink("nothing", dir.join("dangling")).unwrap();
        let to = |path: &str, follow| resolve(&dir, Path::new(path), follow).map_err(|e| e.message);
        assert_eq!(to("/absolute/x", false), Ok(dir.join("etc/x")));
        assert_eq!(to("/absolute", false), Ok(dir.join("absolute")));
        assert_eq!(to("absolute", true), Ok(dir.join("etc")));
        assert_eq!(to("/up/x", true), Ok(dir.join("etc/x")));
        assert_eq!(to("/dangling", true), Ok(dir.join("nothing")));
        assert_eq!(to("/../..", true), Ok(dir.clone()));
        assert_eq!(to("/new/er", true), Ok(dir.join("new/er")));
        assert!(to("/loop", true).unwrap_err().contains("os error 40"));
        assert_eq!(shown(&dir, &dir.join("etc/x")), Path::new("/etc/x"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
