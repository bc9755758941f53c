-- Puts a tenant's sets right where they and the jobs' control hashes disagree. The caller read the ids from the sets.
-- ARGV: P R tenant id …  Returns {{id, outcome} …} of what was wrong; outcome: 'queued', 'running', 'closed'.
local tenant = ARGV[3]
local queued, running = k_tenant_queued(tenant), k_tenant_running(tenant)
local done = {}

-- Nobody can count what is no set; the jobs come back into it as they move.
for _, key in ipairs({queued, running}) do
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'set' and kind ~= 'none' then redis.call('DEL', key) end
end

local function is_in(set, id) return redis.call('SISMEMBER', set, id) == 1 end

local function audit(id)
  local c = redis.pcall('HMGET', k_job(id), 'st', 'tn')
  local state = not c.err and c[2] == tenant and OPEN[c[1]] and c[1] or 'closed'
  if is_in(queued, id) == (state == 'queued') and is_in(running, id) == (state == 'running') then return end
  redis.call('SREM', queued, id)
  redis.call('SREM', running, id)
  if state ~= 'closed' then redis.call('SADD', state == 'queued' and queued or running, id) end
  done[#done + 1] = {id, state}
end

for i = 4, #ARGV do audit(ARGV[i]) end
forget_idle(tenant)
return done
