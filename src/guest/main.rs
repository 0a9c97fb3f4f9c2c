//! `vmcache-agent`: all of it is in the library's `guest` module.

fn main() {
    vmcache::guest::main()
}
