//! Every path under `/etc`, `/var` and `/run` that the appliance knows by itself.

pub const CONFIG_FILE: &str = "/etc/dealscale/dealscale.toml";
pub const STATE_DIR: &str = "/var/lib/dealscale";
pub const ADMIN_SOCKET: &str = "/run/dealscale/admin.sock";
