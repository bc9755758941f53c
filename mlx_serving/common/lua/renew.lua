-- Renews leases of jobs whose engine made progress, whether or not they emitted.
-- ARGV: P R worker lease_ms, then id epoch a job. Returns per job {status 'OK'|'FENCED', cancel_reason}.
local worker, lease = ARGV[3], tonumber(ARGV[4])
local now = now_ms()
local replies = {}

local function renew(id, epoch)
  if not is_hash(k_job(id)) then return {'FENCED', ''} end
  local c = redis.call('HMGET', k_job(id), 'st', 'ep', 'ow', 'q', 'ca')
  if c[1] == 'running' and c[2] == epoch and c[3] == worker then
    -- It removes nothing: a full Redis lets a script go on that has begun to write, and a renewal takes no memory.
    redis.call('ZREM', k_leases(c[4]), '')
    redis.call('ZADD', k_leases(c[4]), int(now + lease), id)
    if c[5] == '' then
      c[5] = stock_verdict(id)
      if c[5] ~= '' then redis.call('HSET', k_job(id), 'ca', c[5]) end
    end
    return {'OK', c[5] or ''}
  end
  return {'FENCED', ''}
end

for i = 5, #ARGV, 2 do replies[#replies + 1] = renew(ARGV[i], ARGV[i + 1]) end
return replies
